"""Which tile a call takes: a tuned table, a cost model, or a rule. No torch."""

"""The reference's activation, finalize and whole layer, against slower computations."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import oracles
import pytest
import torch

from mxfp4_moe import formats, reference
from mxfp4_moe.weights import Activation, MoEWeights


class TestActivate:
    def gemm1(self, rows: int, inter: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """Prepared columns, and the gates and ups in them, placed one by one."""
        rng = np.random.default_rng(0)
        gate, up = (rng.normal(0, 6, (rows, inter)).astype(np.float32) for _ in range(2))
        return torch.from_numpy(self.prepared(gate, up)), gate, up

    def prepared(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        out = np.empty((len(gate), 2 * gate.shape[1]), dtype=np.float32)
        for j in range(gate.shape[1]):
            out[:, 16 * (j // 8) + j % 8] = gate[:, j]
            out[:, 16 * (j // 8) + 8 + j % 8] = up[:, j]
        return out

    @pytest.mark.parametrize("activation", [*Activation, "swiglu", "relu2"])
    @pytest.mark.parametrize("numbers", [(1.702, 1.0, 7.0), (1.0, 0.0, None), (0.5, -2.0, 1.5), "per expert"])
    @pytest.mark.parametrize("bias", [False, True])
    def test_against_float64(self, activation: str, numbers: Any, bias: bool) -> None:
        gemm1, gate, up = self.gemm1(50, 64)
        row_expert = torch.arange(50) // 20
        gated = Activation(activation).is_gated
        if not gated:
            gemm1 = torch.from_numpy(gate)
        w13_bias = None
        if bias:
            rng = np.random.default_rng(1)
            gate_bias, up_bias = (rng.normal(size=(3, 64)).astype(np.float32) for _ in range(2))
            w13_bias = torch.from_numpy(self.prepared(gate_bias, up_bias) if gated else gate_bias)
            gate, up = gate + gate_bias[row_expert], up + up_bias[row_expert]
        ours = theirs = numbers
        if numbers == "per expert":
            ours = tuple(torch.tensor(n) for n in ([1.702, 1.0, 0.5], [1.0, 0.0, -2.0], [7.0, 1e30, 1.5]))
        if activation == "situ":  # whose beta is a bound
            beta = ours[1]
            ours = (ours[0], beta.abs() + 0.5 if numbers == "per expert" else abs(beta) + 0.5, ours[2])
            theirs = ours
        if numbers == "per expert":
            theirs = tuple(n[row_expert].double().numpy()[:, None] for n in ours)
        out = reference.activate(gemm1, row_expert, w13_bias, activation, *ours)
        name = Activation(activation).value
        if gated:
            expected = oracles.two_inputs(gate.astype(np.float64), up.astype(np.float64), name, *theirs)
        else:
            expected = oracles.one_input(gate.astype(np.float64), name, theirs[2])
        assert out.dtype == torch.float32
        assert out.shape == (50, 64)
        # Four roundings, the sigmoid's or erfc's few ulps (more where the argument is large); u + beta may cancel,
        # hence the absolute part.
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5 if name.startswith("ge") else 2e-6, atol=2e-6)

    def test_far_below_zero_nothing_cancels(self) -> None:
        x = torch.linspace(-8, -3, 64)[None]
        for name in ("silu", "gelu", "gelu_tanh"):
            out = reference.activate(x, torch.zeros(1, dtype=torch.int32), None, name)
            expected = oracles.one_input(x.double().numpy(), name)
            # The relative error of exp(y) is the absolute one of y, and |y| reaches 50.
            np.testing.assert_allclose(out.numpy(), expected, rtol=3e-5, atol=0)

    @pytest.mark.parametrize("activation", list(Activation))
    def test_nan_and_infinity_spoil_their_own_value(self, activation: Activation) -> None:
        """NaN gives NaN. An infinity gives NaN or what the formula's limit is: never a number that was clamped away."""
        width = 64 if activation.is_gated else 32
        gemm1 = torch.ones(3, width)
        gemm1[0, 0], gemm1[1, 2] = math.nan, math.inf
        if activation.is_gated:
            gemm1[2, 8 + 1] = math.nan  # an up
        else:
            gemm1[2, 1] = math.nan
        out = reference.activate(gemm1, torch.zeros(3, dtype=torch.int32), None, activation)
        assert out[0, 0].isnan()
        assert out[2, 1].isnan()
        spoiled = torch.zeros(3, 32, dtype=torch.bool)
        spoiled[0, 0] = spoiled[1, 2] = spoiled[2, 1] = True
        assert out[~spoiled].isfinite().all()
        assert (out[~spoiled] == out[0, 5]).all()

    def test_soft_clamps(self) -> None:
        """Small values lose nothing, large ones end at the bounds, and a NaN is no large value."""
        row = torch.zeros(1, dtype=torch.int32)
        gate = np.float32([[1e-30, -1e-12, 1e-6, 1e-3, 3.0, 1e30, math.inf, -math.inf]])
        up = np.float32([[1e-6, 1e-12, -1e-3, 30.0, 1e4, math.inf, -math.inf, 1.0]])
        out = reference.activate(torch.from_numpy(self.prepared(gate, up)), row, None, "situ", 0.0, 4.0, 25.0)
        expected = oracles.two_inputs(gate.astype(np.float64), up.astype(np.float64), "situ", 0.0, 4.0, 25.0)
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-6, atol=0)
        assert out[0, 5:7].tolist() == [100.0, -100.0]  # 4 * 25, the most that it can be
        for spoiled in ((math.nan, 1.0), (1.0, math.nan)):
            columns = self.prepared(*(np.full((1, 8), x, np.float32) for x in spoiled))
            assert reference.activate(torch.from_numpy(columns), row, None, "situ", 0.0, 4.0, 25.0).isnan().all()
        x = torch.tensor([[-math.inf, -3.0, 0.0, 1e-12, 1e-3, 1.0, 1e30, math.inf]])
        out = reference.activate(x, row, None, "clamped_relu2", limit=16.0)
        expected = oracles.one_input(x.double().numpy(), "clamped_relu2", 16.0)
        np.testing.assert_allclose(out.numpy(), expected, rtol=1e-6, atol=0)
        assert out[0, -1] == 16.0**2
        for name in ("situ", "clamped_relu2"):  # without a limit the larger ones are let through
            gemm1 = torch.full((1, 16 if name == "situ" else 8), 3e8)
            near = 4.0 * 3e8 if name == "situ" else 3e8**2
            out = reference.activate(gemm1, row, None, name, beta=4.0, limit=None)
            torch.testing.assert_close(out, torch.full((1, 8), near), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("rounding", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("activation", list(Activation))
    def test_rounding(self, activation: Activation, bias: bool, rounding: torch.dtype) -> None:
        """Gates and ups before the bias, and the result: each to nearest, ties to even, by numpy and ml_dtypes."""
        dtype = np.dtype(np.float16 if rounding is torch.float16 else ml_dtypes.bfloat16)
        gemm1, gate, up = self.gemm1(50, 64)
        gate[0] = 1 + np.arange(64) * 2.0 ** (-11 if rounding is torch.float16 else -8)  # every second one is a tie
        gemm1 = torch.from_numpy(self.prepared(gate, up) if activation.is_gated else gate)
        gate, up = (x.astype(dtype).astype(np.float64) for x in (gate, up))
        w13_bias = None
        if bias:
            rng = np.random.default_rng(1)
            gate_bias, up_bias = (rng.normal(size=(1, 64)).astype(np.float32) for _ in range(2))
            w13_bias = torch.from_numpy(self.prepared(gate_bias, up_bias) if activation.is_gated else gate_bias)
            gate, up = gate + gate_bias, up + up_bias
        row_expert = torch.zeros(50, dtype=torch.int64)
        out = reference.activate(gemm1, row_expert, w13_bias, activation, rounding=rounding)
        name = activation.value
        if activation.is_gated:
            exact = oracles.two_inputs(gate, up, name, 1.702, 1.0, 7.0)
        else:
            exact = oracles.one_input(gate, name, 7.0)
        assert out.dtype == torch.float32
        assert torch.equal(out, out.to(rounding).float())
        expected = exact.astype(np.float32).astype(dtype).astype(np.float64)
        # Rarely fp32's own error carries a value over a tie: then it is the neighbour, one step away.
        step = 2.0**-10 if rounding is torch.float16 else 2.0**-7
        np.testing.assert_allclose(out.numpy(), expected, rtol=step, atol=1e-6)
        large = np.abs(expected) > 1e-4  # below, float64's own 1 + tanh has cancelled, and float16 has denormals
        assert (out.numpy() != expected)[large].mean() < 1e-2
        assert not torch.equal(out, reference.activate(gemm1, row_expert, w13_bias, activation))

    def test_rounding_past_float16_is_infinity(self) -> None:
        gemm1 = torch.tensor([[65519.0, 65520.0, 300.0, -1e30]])
        row = torch.zeros(1, dtype=torch.int64)
        out = reference.activate(gemm1, row, None, "identity", rounding=torch.float16)
        assert out.tolist() == [[65504.0, math.inf, 300.0, -math.inf]]
        out = reference.activate(gemm1, row, None, "relu2", rounding=torch.float16)
        assert out.tolist() == [[math.inf, math.inf, math.inf, 0.0]]

    def test_clamps_as_gpt_oss_does(self) -> None:
        gate, up = np.zeros((1, 32), np.float32), np.zeros((1, 32), np.float32)
        gate[0, :3], up[0, :3] = [100, -100, 1], [100, -100, -100]
        out = reference.activate(
            torch.from_numpy(self.prepared(gate, up)), torch.zeros(1, dtype=torch.int32), None, "swiglu_oai"
        )
        sigmoid = 1 / (1 + math.exp(-1.702))
        expected = [7 / (1 + math.exp(-1.702 * 7)) * 8, 0, sigmoid * -6]  # the gate has no lower clamp
        np.testing.assert_allclose(out[0, :3].numpy(), expected, rtol=1e-6, atol=1e-30)

    def test_nan_stays(self) -> None:
        gemm1 = torch.zeros(2, 64)
        gemm1[1] = math.nan
        out = reference.activate(gemm1, torch.zeros(2, dtype=torch.int32), None, "swiglu_oai")
        assert out[1].isnan().all()
        assert out[0].isfinite().all()

    def test_refuses(self) -> None:
        rows = torch.zeros(2, dtype=torch.int32)
        with pytest.raises(ValueError, match="activation: expected one of 'swiglu', 'swiglu_oai', .*, got 'tanh'"):
            reference.activate(torch.zeros(2, 64), rows, None, "tanh")
        with pytest.raises(ValueError, match=r"gemm1: expected 2I a multiple of 16, got float32 \[2, 24\]"):
            reference.activate(torch.zeros(2, 24), rows, None, "swiglu")
        with pytest.raises(ValueError, match=r"row_expert: expected int32 or int64 \[3\], got int32 \[2\]"):
            reference.activate(torch.zeros(3, 64), rows, None, "swiglu")
        with pytest.raises(TypeError, match=r"w13_bias: expected float32 \[E, 64\], got bfloat16 \[1, 64\]"):
            reference.activate(torch.zeros(2, 64), rows, torch.zeros(1, 64).bfloat16(), "swiglu")
        with pytest.raises(TypeError, match=r"rounding: expected torch.bfloat16, torch.float16 or None, got torch.flo"):
            reference.activate(torch.zeros(2, 64), rows, None, "swiglu", rounding=torch.float32)


class TestFinalize:
    def test_adds_in_slot_order(self) -> None:
        # In float32, (2^24 + 1) - 2^24 is 0 and (2^24 - 2^24) + 1 is 1.
        rows = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]]).bfloat16()
        row_expert = torch.zeros(3, dtype=torch.int32)
        for order, expected in (([0, 1, 2], 0.0), ([0, 2, 1], 1.0), ([1, 0, 2], 0.0)):
            slot_row = torch.tensor(order, dtype=torch.int32)
            out = reference.finalize(rows, torch.ones(1, 3), slot_row, row_expert, None)
            assert out.item() == expected

    def test_the_product_is_not_rounded(self) -> None:
        # w * row = 1 - 2^-46 rounds to 1 in float32; fused with -1 it leaves -2^-46.
        rows = torch.tensor([[-1.0], [1.0]]).bfloat16()
        bias = torch.tensor([[0.0], [2.0**-23]])
        weights = torch.tensor([[1.0, 1 - 2.0**-23]])
        slots = torch.tensor([0, 1], dtype=torch.int32)
        out = reference.finalize(rows, weights, slots, torch.tensor([0, 1]), bias)
        assert out.item() == -(2.0**-46)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_bias_and_dropped_slots(self, dtype: torch.dtype) -> None:
        rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).to(dtype)
        bias = torch.tensor([[10.0, 20.0], [100.0, 200.0]])
        slot_row = torch.tensor([2, -1, -1, -1, 0, 1], dtype=torch.int32)
        weights = torch.tensor([[2.0, math.nan], [math.nan, math.inf], [1.0, 0.5]])
        out = reference.finalize(rows, weights, slot_row, torch.tensor([0, 0, 1]), bias)
        assert out.dtype == dtype
        assert out.tolist() == [[210.0, 412.0], [0.0, 0.0], [11 + 6.5, 22 + 12]]


# |out - float64| / |float64|, norms over the whole output. Rows, then their sum, are rounded to the output dtype, each
# time by at most u = 2^-8 (bfloat16) or 2^-11 (float16) and by less than 0.5u root mean square; together they stay
# below u. A few E4M3 codes flip where float32 and float64 fall on different sides of a tie, which is lost beside that.
TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class TestFusedMoe:
    def inputs(
        self, tokens: int, experts: int, top_k: int, hidden: int, dtype: torch.dtype, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        hidden_states = torch.randn(tokens, hidden, generator=generator).to(dtype)
        scores = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1)
        return hidden_states, scores.values.softmax(dim=1), scores.indices.to(torch.int32)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("order", ["interleaved", "gate_up", "up_gate"])
    @pytest.mark.parametrize("activation", oracles.GATED)
    @pytest.mark.parametrize(("hidden", "inter"), [(96, 160), (288, 64)])
    def test_against_a_dense_float64_layer(
        self, dtype: torch.dtype, order: str, activation: str, hidden: int, inter: int
    ) -> None:
        checkpoint = oracles.random_checkpoint(6, hidden, inter, seed=1)
        hidden_states, topk_weights, topk_ids = self.inputs(37, 6, 3, hidden, dtype)
        topk_ids[3] = torch.tensor([4, 4, 4])  # an expert three times in one token
        topk_ids[5] = torch.tensor([-1, 6, 2])  # ids that count for nothing
        topk_ids[8] = -1
        weights = MoEWeights.from_mxfp4(**checkpoint, gate_up_order=order, activation=activation)
        out = reference.fused_moe(hidden_states, topk_weights, topk_ids, weights)
        expected = oracles.dense_moe(
            hidden_states, topk_weights, topk_ids, checkpoint, gate_up_order=order, activation=activation
        )
        assert (out.dtype, out.shape) == (dtype, hidden_states.shape)
        assert out[8].count_nonzero() == 0
        error = np.linalg.norm(out.double().numpy() - expected) / np.linalg.norm(expected)
        assert error <= TOLERANCE[dtype]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("activation", oracles.NOT_GATED)
    @pytest.mark.parametrize("bias", [False, True])
    def test_not_gated(self, activation: str, bias: bool, dtype: torch.dtype) -> None:
        checkpoint = oracles.random_checkpoint(6, 96, 160, seed=3, gated=False)
        if not bias:
            del checkpoint["w13_bias"], checkpoint["w2_bias"]
        hidden_states, topk_weights, topk_ids = self.inputs(19, 6, 3, 96, dtype)
        topk_ids[5] = torch.tensor([-1, 6, 2])
        weights = MoEWeights.from_mxfp4(**checkpoint, activation=activation)
        assert (weights.intermediate_size, weights.hidden_size) == (160, 96)
        out = reference.fused_moe(hidden_states, topk_weights, topk_ids, weights)
        expected = oracles.dense_moe(hidden_states, topk_weights, topk_ids, checkpoint, activation=activation)
        error = np.linalg.norm(out.double().numpy() - expected) / np.linalg.norm(expected)
        assert error <= TOLERANCE[dtype]

    def test_numbers_of_each_expert(self) -> None:
        """Experts with numbers of their own are single experts with those numbers."""
        checkpoint = oracles.random_checkpoint(3, 64, 96, seed=4)
        numbers = {"alpha": [1.702, 1.0, 0.5], "beta": [1.0, 0.0, -0.5], "limit": [7.0, 0.5, 2.0]}
        hidden_states, topk_weights, topk_ids = self.inputs(9, 3, 1, 64, torch.bfloat16)
        each = {name: torch.tensor(values) for name, values in numbers.items()}
        out = reference.fused_moe(hidden_states, topk_weights, topk_ids, MoEWeights.from_mxfp4(**checkpoint, **each))
        for e in range(3):
            single = {name: values[e] for name, values in numbers.items()}
            alone = reference.fused_moe(
                hidden_states, topk_weights, topk_ids, MoEWeights.from_mxfp4(**checkpoint, **single)
            )
            rows = topk_ids[:, 0] == e
            assert torch.equal(out[rows], alone[rows])

    @pytest.mark.parametrize("numbers", [{"alpha": 1.0, "beta": 0.5, "limit": None}, {"limit": 0.75}])
    def test_activation_numbers_and_no_bias(self, numbers: dict[str, float | None]) -> None:
        checkpoint = oracles.random_checkpoint(4, 64, 96, seed=2)
        del checkpoint["w13_bias"], checkpoint["w2_bias"]
        hidden_states, topk_weights, topk_ids = self.inputs(9, 4, 2, 64, torch.bfloat16)
        out = reference.fused_moe(
            hidden_states, topk_weights, topk_ids.long(), MoEWeights.from_mxfp4(**checkpoint, **numbers)
        )
        expected = oracles.dense_moe(hidden_states, topk_weights, topk_ids, checkpoint, **numbers)
        error = np.linalg.norm(out.double().numpy() - expected) / np.linalg.norm(expected)
        assert error <= TOLERANCE[torch.bfloat16]

    @pytest.mark.parametrize("output_dtype", [None, torch.bfloat16, torch.float16])
    def test_intermediate_rounding_is_to_the_output_dtype(self, output_dtype: torch.dtype | None) -> None:
        weights = MoEWeights.from_mxfp4(**oracles.random_checkpoint(4, 64, 96, seed=2))
        args = (*self.inputs(9, 4, 2, 64, torch.bfloat16), weights)
        out = reference.fused_moe(*args, output_dtype=output_dtype, intermediate_rounding=True)

        def between(gemm1: torch.Tensor, row_expert: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rounded = gemm1.to(out.dtype).float()
            numbers = (weights.alpha, weights.beta, weights.limit)
            values = reference.activate(rounded, row_expert, weights.w13_bias, weights.activation, *numbers)
            return formats.quantize_mxfp8(values.to(out.dtype).float())

        assert out.dtype == (output_dtype or torch.bfloat16)
        assert torch.equal(out, reference.layer(*args, between, output_dtype=output_dtype))
        assert not torch.equal(out, reference.fused_moe(*args, output_dtype=output_dtype))

    def test_a_token_does_not_depend_on_its_batch(self) -> None:
        weights = MoEWeights.from_mxfp4(**oracles.random_checkpoint(8, 128, 96))
        hidden_states, topk_weights, topk_ids = self.inputs(40, 8, 4, 128, torch.bfloat16)
        out = reference.fused_moe(hidden_states, topk_weights, topk_ids, weights)
        for t in (0, 17, 39):
            one = slice(t, t + 1)
            assert torch.equal(
                reference.fused_moe(hidden_states[one], topk_weights[one], topk_ids[one], weights), out[one]
            )

    def test_no_tokens_and_no_valid_ids(self) -> None:
        weights = MoEWeights.from_mxfp4(**oracles.random_checkpoint(3, 64, 32))
        hidden_states, topk_weights, topk_ids = self.inputs(5, 3, 2, 64, torch.float16)
        empty = reference.fused_moe(hidden_states[:0], topk_weights[:0], topk_ids[:0], weights)
        assert (empty.shape, empty.dtype) == ((0, 64), torch.float16)
        for bad in (-1, 3, 2**31 - 1, -(2**31)):
            out = reference.fused_moe(hidden_states, topk_weights, torch.full_like(topk_ids, bad), weights)
            assert out.shape == hidden_states.shape
            assert out.count_nonzero() == 0

    def test_a_bad_token_spoils_only_itself(self) -> None:
        weights = MoEWeights.from_mxfp4(**oracles.random_checkpoint(3, 64, 32))
        hidden_states, topk_weights, topk_ids = self.inputs(6, 3, 2, 64, torch.bfloat16)
        hidden_states[2, 33] = math.inf
        out = reference.fused_moe(hidden_states, topk_weights, topk_ids, weights)
        assert out[2].isnan().all()
        assert out[[0, 1, 3, 4, 5]].isfinite().all()

    def test_refuses(self) -> None:
        weights = MoEWeights.from_mxfp4(**oracles.random_checkpoint(3, 64, 32))
        hidden_states, topk_weights, topk_ids = self.inputs(5, 3, 2, 64, torch.bfloat16)
        moe = reference.fused_moe
        with pytest.raises(TypeError, match=r"hidden_states: expected bfloat16 or float16 .*, got float32 \[5, 64\]"):
            moe(hidden_states.float(), topk_weights, topk_ids, weights)
        with pytest.raises(ValueError, match=r"hidden_states: .* \[T, 64\], got bfloat16 \[5, 32\]"):
            moe(hidden_states[:, :32], topk_weights, topk_ids, weights)
        with pytest.raises(ValueError, match=r"hidden_states: .* on cpu, got bfloat16 \[5, 64\] on meta"):
            moe(hidden_states.to("meta"), topk_weights, topk_ids, weights)
        with pytest.raises(ValueError, match=r"topk_ids: expected int32 or int64 \[5, k\], got int32 \[4, 2\]"):
            moe(hidden_states, topk_weights, topk_ids[:4], weights)
        with pytest.raises(TypeError, match=r"topk_ids: expected int32 or int64 \[5, k\], got int16 \[5, 2\]"):
            moe(hidden_states, topk_weights, topk_ids.short(), weights)
        with pytest.raises(TypeError, match=r"topk_weights: expected float32 \[5, 2\], got bfloat16 \[5, 2\]"):
            moe(hidden_states, topk_weights.bfloat16(), topk_ids, weights)
        with pytest.raises(ValueError, match=r"topk_weights: expected float32 \[5, 2\], got float32 \[5, 1\]"):
            moe(hidden_states, topk_weights[:, :1], topk_ids, weights)
        with pytest.raises(TypeError, match="weights: expected MoEWeights, got dict"):
            moe(hidden_states, topk_weights, topk_ids, {})

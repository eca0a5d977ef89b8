"""Other libraries' models with this library's layers; each module here needs the library that it is named after."""

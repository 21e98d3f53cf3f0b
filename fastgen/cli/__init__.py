"""The commands; `main` is the one name for all of them."""

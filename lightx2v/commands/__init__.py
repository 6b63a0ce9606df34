"""Commands that ask and report; each adds its flags to a parser and runs them."""

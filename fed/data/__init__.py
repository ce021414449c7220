"""Rows of digits or text: where they come from, tokenised, held out and dealt to clients."""

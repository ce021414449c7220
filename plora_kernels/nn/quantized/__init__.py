"""Adapters over quantised linears of bitsandbytes and torchao, in the frozen form."""

"""Runs on many machines through Flower: the server and the clients as Flower's apps, and what they send each other."""

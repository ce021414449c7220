"""PEFT's own layers with fused forwards: same parameters, same names, same files."""

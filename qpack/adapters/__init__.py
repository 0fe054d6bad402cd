"""PEFT adapters: what they change in a base, and what they were made on."""

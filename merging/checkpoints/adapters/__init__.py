"""PEFT LoRA directories as checkpoints."""

"""The policy: model, optimizer, checkpoints. The only room that reads Megatron's parallel state."""

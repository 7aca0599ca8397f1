"""The loops; each can be killed and goes on from its last state."""

"""The loops; the long ones can be killed and go on from their last state."""

"""What people look at: figures, volumes that turn, tables, and the privacy statement."""

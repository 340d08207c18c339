"""The three stages in the paper's order: behaviour, critic, energy; one file each, with its loss, step and state."""

"""What acts: policies in pure torch, and the contract that every other room uses."""

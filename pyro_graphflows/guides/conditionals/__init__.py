"""The conditionals of a block of sites: one contract, and the families that fulfil it."""

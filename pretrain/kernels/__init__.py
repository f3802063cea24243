"""Fused tiles on a GPU: `choice` says when, `fused_tiles` runs them, `triton_blocks` is what runs there."""

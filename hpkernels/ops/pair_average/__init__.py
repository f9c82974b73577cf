"""The one weighted average that the losses on masks make of their statistics."""

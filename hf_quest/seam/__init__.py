"""Everything that knows Transformers."""

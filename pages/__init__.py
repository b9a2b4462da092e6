"""The documentation site: what mkdocs does not find in `docs/` is made here, from the code and from other pages."""

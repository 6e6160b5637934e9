"""Mathematics on finished adapters: resizing, merging, extracting, comparing. It knows no command line."""

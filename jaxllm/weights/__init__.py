"""From files to parameters: sources, mapping rules, loading, the converted checkpoint."""

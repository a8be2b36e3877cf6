"""Model families as data.

Owns what each family's `config.json`, weights and templates call things, and the presets. Knows no file format beyond
`config.json` and no process."""

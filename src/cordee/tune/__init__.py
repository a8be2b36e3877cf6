"""Training less than all: adapters (LoRA). What is there of them in a model, its parameters' origins say."""

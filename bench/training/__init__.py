"""A GPT, trained with dense and with 2:4 networks."""

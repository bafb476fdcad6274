"""The driver: one engine on the stages of one pipeline, and all that it takes to have them."""

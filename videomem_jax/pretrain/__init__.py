"""The demo's base model: a tiny Qwen3-VL that can see, describe and read, and knows no memory."""

"""How the checkpoint in examples/tiny-llada2 was made and measured: tasks, tokenizer, training, evaluation."""

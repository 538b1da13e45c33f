"""How the demo checkpoint llava-tiny is made: scenes, questions, tokenizer, training, evaluation."""

"""How the demo checkpoint llava-tiny is made: scenes, questions, training, evaluation."""

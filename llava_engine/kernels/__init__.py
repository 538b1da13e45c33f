"""Operations with a torch reference that defines them; csrc/ supplies the CUDA side."""

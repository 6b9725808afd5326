"""The soak test: trainings that faults hit at random times end with the weights of trainings that none hit."""

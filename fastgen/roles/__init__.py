"""What a network plays: teacher, student, critic, target or discriminator, as a copy or an adapter."""

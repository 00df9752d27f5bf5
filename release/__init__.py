"""What a release has to pass: contents of wheel and sdist, a clean installation, each extra alone, the lowest versions."""

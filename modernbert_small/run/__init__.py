"""What a script is: its settings, its artefacts, its errors, its processes and devices."""

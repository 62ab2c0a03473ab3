"""Ways in for people who keep their engine, where the engine has a seam to hook into."""

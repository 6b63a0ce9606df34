"""Small trained checkpoints in the real models' layouts, the world they know, and the judge that scores them."""

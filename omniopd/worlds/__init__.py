"""Small closed worlds in which a whole distillation run takes minutes on a CPU."""

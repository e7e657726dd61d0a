"""What workers are asked to do: fine-tune, distil, score importance, fit outputs, predict."""

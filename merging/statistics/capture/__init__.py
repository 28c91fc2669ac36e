"""What a running model shows of its layers: inputs, output gradients, gradients of single examples."""

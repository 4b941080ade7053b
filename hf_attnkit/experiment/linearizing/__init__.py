"""Linear attention in the place of softmax attention: learn the features, choose the layers, fit, distil, train."""

"""Tables, figures in prose and drawings, made of the records in bench/results."""

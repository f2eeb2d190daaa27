"""From words to a configuration, with everything that is wrong with it told at once."""

"""Where a worker's joules come from, and the meter that books them."""

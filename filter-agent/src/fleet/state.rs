//! What is known of the fleet's documents: last good ones, what is held or refused, and since when. Pure: answers and times are
//! parameters.

"""Reports on a server's timeline; speaks to it over HTTP only."""

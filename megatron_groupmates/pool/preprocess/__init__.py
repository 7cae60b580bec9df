"""Raw documents to a pool: tokenise, pack, shuffle and write, on many hosts, in bounded memory."""

"""What a request asks for: read, held against bounds, honoured or refused."""

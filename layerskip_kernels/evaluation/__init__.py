"""What a model and this machine give: bits compared, speed, exits, quality; tables, pages and pictures of them."""

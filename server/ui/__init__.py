"""The page for chatting: plain HTML, CSS and JavaScript, and the routes that hand them out."""

package files

import (
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"net/url"
)

// multipart stores the parts named "file": one at the query's path, or each at its own file name.
func (up *uploader) multipart(body io.Reader, boundary string, q url.Values) ([]written, error) {
	if boundary == "" {
		return nil, faultf(badRequest, "the multipart boundary is missing")
	}
	parts := multipart.NewReader(body, boundary)
	list := []written{}
	for {
		part, err := parts.NextRawPart()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, faultf(badRequest, "the multipart body is damaged or ended early")
		}
		if part.FormName() != "file" {
			continue
		}
		if len(list) >= maxParts {
			return nil, faultf(badRequest, "more than %d files in one upload", maxParts)
		}
		name, err := partPath(part.Header.Get("Content-Disposition"), q.Get("path"), len(list))
		if err != nil {
			return nil, err
		}
		e, err := up.write(name, part, -1)
		if err != nil {
			return nil, err
		}
		list = append(list, e)
	}
	if len(list) == 0 {
		return nil, faultf(badRequest, "the upload holds no part named 'file'")
	}
	return list, nil
}

// partPath tells where the n-th file goes. The file name counts with its directories, unlike in browsers.
func partPath(disposition, path string, n int) (string, error) {
	if path != "" {
		if n > 0 {
			return "", faultf(badRequest, "the query parameter path allows one file only; leave it out and name the files in the parts")
		}
		return path, nil
	}
	_, params, err := mime.ParseMediaType(disposition)
	if err != nil || params["filename"] == "" {
		return "", faultf(badRequest, "part %d has no file name, and there is no query parameter path", n+1)
	}
	return params["filename"], nil
}

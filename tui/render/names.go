package render

// Names are what resources are called, by id. What is not in it is shown by its id.
type Names map[string]string

func (n Names) of(id string) string {
	if name := n[id]; name != "" {
		return name
	}
	return id
}

package store

// batches are the methods that share commits.
type batches struct{}

func (b *batches) start(*Store) {}
func (b *batches) stop()        {}
